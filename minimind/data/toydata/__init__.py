"""The project's own text, in English and Chinese, and the script that makes data of it."""
