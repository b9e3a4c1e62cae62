"""How well each method tunes: small language models, real text, tuned learning rates, several seeds.

    python -m benchmarks.quality --size toy --budget 300 --output quality-toy.json      # on a CPU
    python -m benchmarks.quality --size 26m --budget 3000 --output quality.json         # on a GPU

A byte-level Llama is pretrained on this machine's Python files, then tuned to other text and to two structured tasks.
Each finished run is a line in OUTPUT's neighbour ``.jsonl``; the same command goes on where it stopped.
"""
