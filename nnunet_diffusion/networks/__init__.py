"""Time conditioning, folding and transfer of planned networks."""
