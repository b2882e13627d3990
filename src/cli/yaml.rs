//! JSON values as YAML: block style, strings quoted wherever a reader could take them for something else.

use serde_json::Value;

/// The document, with a newline at its end.
pub(super) fn emit(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => block(&mut out, value, 0),
        Value::Array(items) if !items.is_empty() => block(&mut out, value, 0),
        _ => {
            out += &scalar(value);
            out.push('\n');
        }
    }
    out
}

fn block(out: &mut String, value: &Value, indent: usize) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                *out += &format!("{pad}{}:", string(key));
                child(out, value, indent + 2);
            }
        }
        Value::Array(items) => {
            for item in items {
                let mut inner = String::new();
                child(&mut inner, item, indent + 2);
                // A block begins on the dash's own line.
                let inner = inner.trim_start_matches('\n').trim_start();
                *out += &format!("{pad}- {inner}");
            }
        }
        other => *out += &format!("{pad}{}\n", scalar(other)),
    }
}

fn child(out: &mut String, value: &Value, indent: usize) {
    let nested = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if nested {
        out.push('\n');
        block(out, value, indent);
    } else {
        *out += &format!(" {}\n", scalar(value));
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => string(s),
        Value::Array(_) => "[]".into(),
        Value::Object(_) => "{}".into(),
    }
}

/// Words that YAML 1.1 or 1.2 readers take for booleans or null.
const WORDS: [&str; 9] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];

fn string(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '/')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/'))
        && !WORDS.contains(&text.to_ascii_lowercase().as_str());
    if plain {
        text.into()
    } else {
        // A JSON string is a YAML double-quoted one.
        Value::from(text).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_written_in_blocks() {
        let value = json!({
            "copies": [{"node": "n1", "sync": {"left": 3}}, {"node": "n2", "sync": null}],
            "empty": [],
            "labels": {},
            "list": ["a", 1, [true]],
            "name": "vm1",
            "tricky": ["no", "1.5", "a: b", "", "x\ny"],
        });
        assert_eq!(
            emit(&value),
            "copies:\n  - node: n1\n    sync:\n      left: 3\n  - node: n2\n    sync: null\n\
             empty: []\nlabels: {}\nlist:\n  - a\n  - 1\n  - - true\nname: vm1\n\
             tricky:\n  - \"no\"\n  - \"1.5\"\n  - \"a: b\"\n  - \"\"\n  - \"x\\ny\"\n"
        );
        assert_eq!(emit(&json!([])), "[]\n");
        assert_eq!(emit(&json!([{"a": 1}])), "- a: 1\n");
    }
}
