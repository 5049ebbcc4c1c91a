"""`dmnist export`: write a trained network as a file that runs without this program.

In: a checkpoint. Out: an ONNX, safetensors or torch.export file that was read back and compared before
it was kept. One module for each format.
"""
