"""`python -m benchmarks.zoo` writes docs/zoo.md again."""

from benchmarks.zoo import page

if __name__ == "__main__":
    page.FILE.write_text(page.page(page.rows()), encoding="utf-8")
