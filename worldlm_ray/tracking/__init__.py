"""What happened, from records to files: state of a run, curves, TensorBoard, the audit trail."""
