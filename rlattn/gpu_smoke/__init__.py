"""Everything that needs a GPU, in one run: `python -m rlattn.gpu_smoke`, or `bash launch/gpu_smoke.sh`."""
