"""The folder that ``lens run`` puts in front of PYTHONPATH; Python reads its `sitecustomize` when it starts."""
