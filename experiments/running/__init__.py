"""What runs studies and benchmarks, and writes down what came out."""
