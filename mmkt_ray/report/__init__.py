"""Result files of a run -> one HTML page with its plots. Knows no Ray and loads no model."""
