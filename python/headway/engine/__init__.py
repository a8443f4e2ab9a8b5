"""The loop: plan, launch, collect, commit."""
