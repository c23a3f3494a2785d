"""Everything that needs a GPU, in one run: `python -m rlattn.bench.gpu`, or `bash launch/gpu_smoke.sh`."""
