"""A full round against other systems for federated learning, each as its users deploy it, side by side.

    python -m benchmarks.peers --sizes 0.1 1 10 100 --rounds 5

Four clients that echo the parameters at once, one after the other: Flower's newest release, Flower 1.8's plain
gRPC, NVFlare, and fedmq itself. Each system gets a virtual environment of its own, processes of its own in a
temporary folder, and is killed with all that it started before the next one begins.

What is measured and what would make it unfair: docs/benchmarks.md, "Against other systems".
"""
