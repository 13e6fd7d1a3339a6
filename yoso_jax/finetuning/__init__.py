"""Fine-tuning: sequence and token classification, question answering, multiple choice."""
