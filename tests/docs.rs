//! What the documentation says is there, is there.

use std::fs;
use std::path::Path;
use std::process::Command;

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

/// A section of docs/OPERATIONS.md that says what to type says which test types it.
#[test]
fn every_procedure_names_a_test_that_runs_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/OPERATIONS.md")).unwrap();
    let mut checked = 0;
    // The part before the first title is a table of contents.
    for section in text.split("\n## ").skip(1).flat_map(|s| s.split("\n### ")) {
        let typed = |line: &str| {
            line.starts_with("    ") || line.contains("`lockstep ") || line.contains("`etcdctl ")
        };
        if !section.lines().any(typed) {
            continue;
        }
        let title = section.lines().next().unwrap_or_default();
        let lines: Vec<&str> = section.lines().collect();
        let last = lines
            .iter()
            .rposition(|line| typed(line))
            .unwrap_or_default();
        let after = lines[last..].join("\n");
        let run_by = after.split("*Run by* ").nth(1).unwrap_or_default();
        assert!(
            run_by.starts_with("`tests/"),
            "OPERATIONS, {title}: what is typed there is run by no test"
        );
        checked += 1;
    }
    assert!(checked > 10, "{checked}");
}

/// docs/PROTOCOL.md 11 and 12.5 say where each rule is carried: those files are there, and hold what is named beside them; and
/// the tests that look for a breach.
#[test]
fn what_the_protocol_says_of_the_code_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/PROTOCOL.md")).unwrap();
    let part = |from: &str, to: &str| -> String {
        let begins = text
            .split(from)
            .nth(1)
            .unwrap_or_else(|| panic!("no {from}"));
        begins.split(to).next().unwrap_or_default().into()
    };
    let sections = part("\n## 11. ", "\n## 12. ") + &part("\n### 12.5 ", "\n## 13");
    let sources = files_below(&root.join("src"));
    let (mut files, mut names) = (0, 0);
    for line in sections.lines() {
        let cells: Vec<&str> = line.split(" | ").collect();
        for (column, cell) in cells.iter().enumerate() {
            let mut inside: Vec<String> = Vec::new();
            for span in cell.split('`').skip(1).step_by(2) {
                let is_path = span.ends_with(".rs") || span.ends_with('/');
                let is_test = line.starts_with("| S") && column == 2;
                if is_path {
                    let at = format!("/{span}");
                    let found = sources
                        .iter()
                        .filter(|(path, _)| match span.ends_with('/') {
                            true => path.contains(&at),
                            false => path.ends_with(&at),
                        });
                    inside = found.map(|(_, text)| text.clone()).collect();
                    assert!(!inside.is_empty(), "PROTOCOL names {span}: {line}");
                    files += 1;
                } else if is_test {
                    assert!(
                        root.join(format!("tests/{span}.rs")).exists(),
                        "{span}: {line}"
                    );
                } else if cells.len() > 2 && column == 1 && !inside.is_empty() {
                    let defined = |text: &String| match span.contains("::") {
                        true => text.contains(span),
                        false => ["fn", "struct", "enum"].iter().any(|kind| {
                            ["(", "<", " {"]
                                .iter()
                                .any(|end| text.contains(&format!("{kind} {span}{end}")))
                        }),
                    };
                    assert!(inside.iter().any(defined), "PROTOCOL names {span}: {line}");
                    names += 1;
                }
            }
        }
    }
    assert!(files > 50 && names > 20, "{files} files, {names} names");
}

/// What README and OPERATIONS tell people to type is understood, flag by flag.
#[test]
fn every_command_that_is_shown_is_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut typed = 0;
    for page in ["README.md", "docs/OPERATIONS.md"] {
        let text = fs::read_to_string(root.join(page)).unwrap();
        let whole = text.replace(" \\\n", " ");
        let lines = whole.lines().filter_map(|line| line.strip_prefix("    "));
        let lines = lines.map(|line| line.split(" #").next().unwrap_or_default());
        let spans = text.split('`').skip(1).step_by(2);
        for line in lines.chain(spans) {
            let line = line.trim().trim_end_matches('&');
            // (dots stand for what everybody knows best himself)
            let words = line.split_whitespace().filter(|w| !w.contains('…'));
            let words = words.map(|w| if w == "SHELL" { "bash" } else { w });
            let words: Vec<&str> = words.collect();
            if words.first() != Some(&"lockstep") || line.contains('|') || line.contains('$') {
                continue;
            }
            let done = Command::new(env!("CARGO_BIN_EXE_lockstep"))
                .args(&words[1..])
                .arg("--help")
                .output()
                .unwrap();
            let err = String::from_utf8_lossy(&done.stderr);
            // A flag that is only named is one without its value.
            let named =
                err.contains("a value is required") && words[words.len() - 1].starts_with("--");
            assert!(done.status.success() || named, "{page}: {line}: {err}");
            typed += 1;
        }
    }
    assert!(typed > 40, "{typed}");
}

/// Each source file below `dir`: its path and its text.
fn files_below(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push((
                path.display().to_string(),
                fs::read_to_string(&path).unwrap(),
            ));
        }
    }
    found
}

fn all_below(dir: &Path) -> String {
    let files = files_below(dir).into_iter();
    let others = files.filter(|(path, _)| !path.ends_with("tests/docs.rs"));
    others.map(|(_, text)| text).collect()
}
