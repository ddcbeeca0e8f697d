"""The subject: what a norm computes, and its backward taken apart. For any module; no config, no table, no file."""
