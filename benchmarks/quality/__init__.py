"""How well each method tunes: small language models, real text, tuned learning rates, several seeds.

    python -m benchmarks.quality                                                # on a GPU, under an hour
    python -m benchmarks.quality --size toy --seeds 3 --output runs/toy.json    # on a CPU

A byte-level Llama is pretrained on this machine's Python files, then tuned to other text and to two structured tasks.
Each finished run is a line in OUTPUT's neighbour ``.jsonl``; the same command goes on where it stopped.
"""
