"""`ctxkern adapters`: a bank of LoRA adapters on one language model, trained together in mixed batches."""
