"""What the tests of other programs ask."""

PROMPTS = (
    "Water boils at", "The capital of France is", "Once upon a time", "def fibonacci(n):",
    "The three primary colours are", "Question: What is the largest planet?\nAnswer:", "In 1969, humans first",
    "My favourite recipe for bread starts with", "Die Hauptstadt von Deutschland ist", "Le chat est",
    "The meaning of life is", "To reset your phone, first", "1, 2, 3, 5, 8, 13,", "A haiku about rain:\n",
    "The chemical symbol for gold is", "She opened the door and", "日本の首都は", "import numpy as np\n",
    "Dear Sir or Madam,\n", "The quick brown fox",
)  # fmt: skip
TEXTS = (
    *PROMPTS, "", " ", "  two  spaces   three", "\t\ttabs\n\n\nlines\r\n", "Ünïcödé ß ﬁ Å", "🙂👩‍👩‍👧 flags 🇩🇪", "\u0000\u0007 bytes",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "<b>bold</b> <table>", "a" * 300, "3.14159e-10 #!$%",
    "العربية עברית हिन्दी ไทย 한국어", "CamelCaseAndsnake_case", "<unused7><unk>?",
)  # fmt: skip
