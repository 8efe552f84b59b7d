"""Files on a disk that nobody has to trust: JSON, safetensors, torch.save, and the folders of
the Hub that are made of them."""
