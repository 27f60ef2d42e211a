"""Language, personal data, equivalence of texts and demographic terms. No torch."""
