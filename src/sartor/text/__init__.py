"""Language, personal data, equivalence of texts, and demographic terms, without torch."""
