"""Random ONNX graphs around norms, and what a fold of one must satisfy."""
