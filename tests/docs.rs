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

/// docs/PROTOCOL.md states S1 to S21, says of each what carries it, and each is named there and by a checker.
#[test]
fn every_invariant_is_named_by_the_code_that_carries_it_and_by_a_checker() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/PROTOCOL.md")).unwrap();
    let carried = text.split("### 12.5").nth(1).expect("12.5 says by what");
    let (source, checkers) = (all_below(&root.join("src")), all_below(&root.join("tests")));
    for number in 1..=21 {
        let rule = format!("S{number}");
        for (what, text) in [
            ("12.5", carried),
            ("src/", source.as_str()),
            ("tests/", checkers.as_str()),
        ] {
            let mut words = text.split(|c: char| !c.is_ascii_alphanumeric());
            assert!(
                words.any(|word| word == rule),
                "{what} does not name {rule}"
            );
        }
    }
}

fn all_below(dir: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &all_below(&path);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests/docs.rs") {
            text += &fs::read_to_string(&path).unwrap();
        }
    }
    text
}
