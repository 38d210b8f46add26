"""Embedding models: for now `cuvee quickstart`, the whole of Cuvee's main job on small real data."""
