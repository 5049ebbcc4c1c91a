"""`dmnist export`: write a trained network to a file that runs without this program.

Input: a checkpoint. Output: an ONNX, safetensors or torch.export file, which is kept only after it was read
back and its outputs were compared. Each format has its own module.
"""
