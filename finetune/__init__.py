"""Fine-tune image generators with LoRA, fully, or train small ones from scratch, knowing beforehand what it takes."""
