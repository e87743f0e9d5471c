"""LoRA as data: rules derived from weight rules, the stage that runs them, and the algebra of its matrices."""
