"""What every engine that has a tokenizer does around the model: prompts and rules in, text and parts of answers out."""
