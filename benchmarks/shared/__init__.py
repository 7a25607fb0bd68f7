"""What the benchmarks share: models, ports, engines, the floor, records and pictures."""
