"""Graph passes. Deciding (``sites``, ``policy``) and acting (``sample``, ``sever``) are separate; ``partition`` runs them."""
