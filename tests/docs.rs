//! What the documentation says is there, is there.

use std::fs;
use std::path::Path;

/// Each `tests/FILE.rs::NAME` of docs/OPERATIONS.md: a procedure names the test that runs it.
#[test]
fn every_test_that_a_procedure_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/OPERATIONS.md")).unwrap();
    let mut named = 0;
    for part in text.split('`').filter(|part| part.starts_with("tests/")) {
        let (file, test) = part.split_once("::").unwrap_or((part, ""));
        let source = fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{part}: {e}"));
        let function = format!("#[test]\nfn {test}");
        assert!(source.contains(&function), "{file} has no test {test}");
        named += 1;
    }
    assert!(named > 0, "none is named");
}
