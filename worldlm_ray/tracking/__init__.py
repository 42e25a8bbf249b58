"""From records to the files of a run folder: status, curves, TensorBoard, summary, audit trail."""
