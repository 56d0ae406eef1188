"""One module a contestant, each with ``run(spec) -> measures``; a child process imports one of them
and no other."""
