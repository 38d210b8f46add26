"""Images beside texts, for models that read both: data sets of them, what reads an image, and a model's folder."""
