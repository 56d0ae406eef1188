"""Hold llama.cpp's server to a run and its base: the adapter at scale 1 and 0.

Writes `export --to gguf-adapter`, starts llama-server on it, and asks for greedy answers to
kept rows of the run. It prints how many equal those of transformers, and the largest difference of
the log-probabilities of tokens. Needs `pip install 'chainlora[gguf]'` and llama.cpp.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from chainlora import load_run, open_run

NUM_ROWS, NUM_TOKENS, NUM_LIKELIEST = 2, 16, 10  # rows a stage; tokens an answer; compared a token

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", help="RUN or RUN@STATE, with rows that its stages kept")
parser.add_argument("server", nargs="?", default="llama-server", help="path of llama-server")
given = parser.parse_args()
state, server = open_run(given.run), shutil.which(given.server)
if server is None:
    sys.exit("No llama-server found: install llama.cpp, or give the path of its llama-server.")
rows = [row for kept in state.kept().values() for row in list(kept.train)[:NUM_ROWS]]
if not rows:
    sys.exit(f"{given.run} kept no rows to compare answers to.")


def post(path: str, body: object) -> dict:
    """Return what the server answers."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def wait_for(process: subprocess.Popen) -> None:
    """Return once the model is loaded."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health")
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"llama-server ended:\n{log.read_text(errors='replace')[-2000:]}")


@torch.no_grad()
def compare(model, prompt: tuple[int, ...], scale: float) -> tuple[bool, float]:
    """Say whether two greedy answers are one, and how far apart log-probabilities are at most."""
    request = {
        "prompt": prompt,
        "n_predict": NUM_TOKENS,
        "temperature": 0,
        "repeat_penalty": 1,
        "n_probs": NUM_LIKELIEST,
        "return_tokens": True,
        "cache_prompt": False,
        "lora": [{"id": 0, "scale": scale}],
    }
    answer = post("/completion", request)
    written = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=ends
    )[0].tolist()
    answers = written[len(prompt) :], answer["tokens"]
    own, theirs = ([token for token in tokens if token not in ends] for tokens in answers)
    logits = model(torch.tensor([[*prompt, *answer["tokens"]]])).logits[0, len(prompt) - 1 :]
    worst = 0.0
    for place, found in enumerate(answer["completion_probabilities"]):
        known = logits[place].log_softmax(-1)
        for token in found["top_logprobs"]:
            worst = max(worst, abs(float(known[token["id"]]) - token["logprob"]))
    return theirs == own, worst


with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", Path(folder, "log")
    out = Path(folder, "out")
    export = [sys.executable, "-m", "chainlora", "export", given.run, "--to", "gguf-adapter"]
    subprocess.run([*export, "--output", f"{out}"], check=True, stdout=subprocess.DEVNULL)
    words = [server, "-m", "base.gguf", "--host", "127.0.0.1", "--port", f"{port}", "-c", "2048"]
    words += ["--lora", "adapter.gguf"]
    words += ["-ctk", "f32", "-ctv", "f32"]  # keys and values as transformers has them
    free.close()
    with log.open("w") as lines:
        process = subprocess.Popen(words, cwd=out, stdout=lines, stderr=lines)
    try:
        wait_for(process)
        print("scale  equal answers  largest difference")
        for scale, shown in ((1.0, state), (0.0, state.at("base"))):
            model, tokenizer = load_run(shown, dtype="float32")
            ends = [tokenizer.eos_token_id]
            found = [compare(model, row.prompt, scale) for row in rows]
            equal, worst = sum(same for same, _ in found), max(far for _, far in found)
            print(f"{scale:5g}  {equal:6} of {len(rows)}  {worst:20.1e}")
    finally:
        process.terminate()
        process.wait()
