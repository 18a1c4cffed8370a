"""Routes of per-channel maps through an ONNX graph, on ``onnx_ir``; used by :mod:`normfuse.lowering.onnx_fold`."""
