"""What is measured: `pytest --benchmark`, `python -m bench.gpu`; what is published of it: `bench.report`, `bench.learning`."""
