//! Selectors: which labels somebody means.
//!
//! ```text
//! selector = [ term { "," term } ]             the empty one selects everything
//! term     = key | "!" key
//!          | key ( "==" | "=" | "!=" ) [ value ]
//!          | key ( "in" | "notin" ) "(" value { "," value } ")"
//!          | key ( ">" | "<" ) integer
//! value    = letters without , ( ) = ! < > " and space, or any in double quotes, where \ stands before " and \
//! ```
//!
//! As in Kubernetes, whose users write the same: a label that is not there is not equal to any value and in no set, so
//! `!=` and `notin` select it, and it is neither above nor below a number. So is a value that is no number.

use std::fmt;
use std::iter::Peekable;
use std::str::{CharIndices, FromStr};

use super::fault::Fault;
use super::labels::{Of, is_key_char, own_key};
use super::model::Labels;

/// The longest selector, in bytes: it is kept in rules.
const TEXT_MAX: usize = 4096;
/// Characters that end a value that is not in quotes.
const ENDS: &str = ",()=!<>\"";
const GRAMMAR: &str =
    "write k, !k, k==v, k!=v, k in (a,b), k notin (a,b), k>1 or k<1, joined by ','";

/// A condition on labels: terms, all of which must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Term {
    Has(String),
    Lacks(String),
    Is(String, String),
    IsNot(String, String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Above(String, i64),
    Below(String, i64),
}

/// Text that is no selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("selector '{text}', column {column}: {why}")]
pub struct BadSelector {
    /// What was given.
    pub text: String,
    /// Where it goes wrong, in characters from 1; one behind the last when something is missing there.
    pub column: usize,
    /// What is wrong.
    pub why: String,
    /// What to write instead.
    pub hint: String,
}

impl From<BadSelector> for Fault {
    fn from(error: BadSelector) -> Self {
        Self::input(error.to_string()).hint(error.hint)
    }
}

impl Selector {
    /// Reads a selector of the labels of such things.
    pub fn parse(text: &str, of: Of) -> Result<Self, BadSelector> {
        let mut parser = Parser {
            text,
            rest: text.char_indices().peekable(),
            of,
        };
        if text.len() > TEXT_MAX {
            return Err(parser.bad(TEXT_MAX, format!("it is longer than {TEXT_MAX} bytes")));
        }
        parser.selector()
    }

    /// Whether the labels satisfy every term.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.terms.iter().all(|term| term.holds(labels))
    }
}

impl Term {
    fn holds(&self, labels: &Labels) -> bool {
        let number = |key: &String| labels.get(key).and_then(|v| i64::from_str(v.trim()).ok());
        match self {
            Self::Has(key) => labels.contains_key(key),
            Self::Lacks(key) => !labels.contains_key(key),
            Self::Is(key, value) => labels.get(key) == Some(value),
            Self::IsNot(key, value) => labels.get(key) != Some(value),
            Self::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Self::Above(key, bound) => number(key).is_some_and(|n| n > *bound),
            Self::Below(key, bound) => number(key).is_some_and(|n| n < *bound),
        }
    }
}

/// The selector as it can be read again.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, term) in self.terms.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match term {
                Term::Has(key) => write!(f, "{key}")?,
                Term::Lacks(key) => write!(f, "!{key}")?,
                Term::Is(key, value) => write!(f, "{key}=={}", quoted(value))?,
                Term::IsNot(key, value) => write!(f, "{key}!={}", quoted(value))?,
                Term::In(key, values) => write!(f, "{key} in ({})", list(values))?,
                Term::NotIn(key, values) => write!(f, "{key} notin ({})", list(values))?,
                Term::Above(key, bound) => write!(f, "{key}>{bound}")?,
                Term::Below(key, bound) => write!(f, "{key}<{bound}")?,
            }
        }
        Ok(())
    }
}

fn list(values: &[String]) -> String {
    let values: Vec<String> = values.iter().map(|v| quoted(v)).collect();
    values.join(",")
}

/// The value, in quotes where it could be taken for something else.
fn quoted(value: &str) -> String {
    let plain = |c: char| !c.is_whitespace() && !ENDS.contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return value.into();
    }
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

struct Parser<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
    of: Of,
}

impl Parser<'_> {
    /// Byte offset of what comes next.
    fn at(&mut self) -> usize {
        self.rest.peek().map_or(self.text.len(), |(at, _)| *at)
    }

    fn bad(&self, at: usize, why: impl Into<String>) -> BadSelector {
        let column = self.text.char_indices().take_while(|(i, _)| *i < at);
        BadSelector {
            text: self.text.into(),
            column: column.count() + 1,
            why: why.into(),
            hint: GRAMMAR.into(),
        }
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|(_, c)| *c)
    }

    fn space(&mut self) {
        while self.rest.next_if(|(_, c)| c.is_whitespace()).is_some() {}
    }

    /// Takes `c` if it is next.
    fn take(&mut self, c: char) -> bool {
        self.rest.next_if(|(_, next)| *next == c).is_some()
    }

    fn word(&mut self, part: impl Fn(char) -> bool) -> String {
        let mut word = String::new();
        while let Some((_, c)) = self.rest.next_if(|(_, c)| part(*c)) {
            word.push(c);
        }
        word
    }

    fn expected(&mut self, what: &str) -> BadSelector {
        let at = self.at();
        match self.peek() {
            Some(c) => self.bad(at, format!("{what} is expected, not '{c}'")),
            None => self.bad(at, format!("{what} is expected at its end")),
        }
    }

    fn selector(&mut self) -> Result<Selector, BadSelector> {
        let mut terms = Vec::new();
        self.space();
        if self.peek().is_none() {
            return Ok(Selector { terms });
        }
        loop {
            terms.push(self.term()?);
            self.space();
            if self.peek().is_none() {
                return Ok(Selector { terms });
            }
            if !self.take(',') {
                return Err(self.expected("',' or the end"));
            }
        }
    }

    fn term(&mut self) -> Result<Term, BadSelector> {
        self.space();
        if self.take('!') {
            return Ok(Term::Lacks(self.key()?));
        }
        let key = self.key()?;
        self.space();
        let at = self.at();
        match self.peek() {
            None | Some(',') => Ok(Term::Has(key)),
            Some('=') => {
                self.take('=');
                self.take('=');
                Ok(Term::Is(key, self.value()?))
            }
            Some('!') => {
                self.take('!');
                if !self.take('=') {
                    return Err(self.expected("'=' after '!'"));
                }
                Ok(Term::IsNot(key, self.value()?))
            }
            Some('>') => {
                self.take('>');
                Ok(Term::Above(key, self.integer()?))
            }
            Some('<') => {
                self.take('<');
                Ok(Term::Below(key, self.integer()?))
            }
            Some(c) if is_key_char(c) => match self.word(is_key_char).as_str() {
                "in" => Ok(Term::In(key, self.set()?)),
                "notin" => Ok(Term::NotIn(key, self.set()?)),
                other => Err(self.bad(
                    at,
                    format!("'{other}' is no operator: ==, !=, in, notin, > and < are"),
                )),
            },
            Some(_) => Err(self.expected("an operator (==, !=, in, notin, > or <)")),
        }
    }

    fn key(&mut self) -> Result<String, BadSelector> {
        self.space();
        let at = self.at();
        let key = self.word(is_key_char);
        if key.is_empty() {
            return Err(self.expected("a label's key"));
        }
        own_key(&key, self.of).map_err(|fault| {
            let mut bad = self.bad(at, fault.message);
            bad.hint = fault.hint.unwrap_or(bad.hint);
            bad
        })
    }

    /// A value, which may be empty.
    fn value(&mut self) -> Result<String, BadSelector> {
        self.space();
        let begin = self.at();
        if !self.take('"') {
            return Ok(self.word(|c| !c.is_whitespace() && !ENDS.contains(c)));
        }
        let mut value = String::new();
        loop {
            let at = self.at();
            match self.rest.next() {
                Some((_, '"')) => return Ok(value),
                Some((_, '\\')) => match self.rest.next() {
                    Some((_, c @ ('"' | '\\'))) => value.push(c),
                    _ => {
                        return Err(
                            self.bad(at, "in quotes, '\\' stands before '\"' or another '\\'")
                        );
                    }
                },
                Some((_, c)) => value.push(c),
                None => return Err(self.bad(begin, "this quote is not closed")),
            }
        }
    }

    fn set(&mut self) -> Result<Vec<String>, BadSelector> {
        self.space();
        if !self.take('(') {
            return Err(self.expected("'('"));
        }
        let mut values = Vec::new();
        loop {
            self.space();
            let in_quotes = self.peek() == Some('"');
            let value = self.value()?;
            if value.is_empty() && !in_quotes {
                return Err(self.expected("a value (\"\" for the empty one)"));
            }
            values.push(value);
            self.space();
            if self.take(')') {
                return Ok(values);
            }
            if !self.take(',') {
                return Err(self.expected("',' or ')'"));
            }
        }
    }

    fn integer(&mut self) -> Result<i64, BadSelector> {
        self.space();
        let at = self.at();
        let text = self.word(|c| !c.is_whitespace() && !ENDS.contains(c));
        if text.is_empty() {
            return Err(self.expected("an integer"));
        }
        text.parse()
            .map_err(|_| self.bad(at, format!("'{text}' is not an integer of 64 bits")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn a_selector_selects_as_the_table_says() {
        let labels = labels(&[
            ("env", "prod"),
            ("tier", "1"),
            ("words", "a, (b)=\"c\\"),
            ("empty", ""),
            ("lockstep.io/replicas", "2"),
        ]);
        for (text, expected) in [
            ("", true),
            ("  ", true),
            ("env", true),
            ("!env", false),
            ("! missing", true),
            ("env=prod", true),
            ("env==prod", true),
            ("env == prod", true),
            ("env!=prod", false),
            ("env != dev , tier", true),
            ("env==prod,!tier", false),
            ("missing!=x", true),
            ("missing==", false),
            ("empty==", true),
            ("empty=\"\"", true),
            ("empty!=", false),
            ("storageos.com/replicas=2", true),
            ("env in (dev,prod)", true),
            ("env in(dev)", false),
            ("env notin (dev)", true),
            ("env notin ( dev , \"prod\" )", false),
            ("missing in (x)", false),
            ("missing notin (x)", true),
            ("empty in (\"\")", true),
            ("tier>0", true),
            ("tier > 1", false),
            ("tier<2", true),
            ("tier<-1", false),
            ("env>0", false),
            ("env<0", false),
            ("missing<9", false),
            ("missing>-9", false),
            ("lockstep.io/replicas>1,tier<2,env in (prod)", true),
            (r#"words=="a, (b)=\"c\\""#, true),
            ("in", false),
            ("in in (in)", false),
        ] {
            let selector = Selector::parse(text, Of::Volume).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(selector.matches(&labels), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (text, column, why) in [
            (",", 1, "a label's key is expected, not ','"),
            ("a,", 3, "a label's key is expected at its end"),
            ("a,,b", 3, "a label's key is expected, not ','"),
            ("a b", 3, "'b' is no operator"),
            (
                "a ä",
                3,
                "an operator (==, !=, in, notin, > or <) is expected",
            ),
            ("ä", 1, "a label's key is expected, not 'ä'"),
            ("!", 2, "a label's key is expected at its end"),
            ("!a==b", 3, "',' or the end is expected, not '='"),
            ("a!b", 3, "'=' after '!' is expected, not 'b'"),
            ("a==b c", 6, "',' or the end is expected, not 'c'"),
            ("a===b", 4, "',' or the end is expected, not '='"),
            ("a in b", 6, "'(' is expected, not 'b'"),
            ("a in ()", 7, "a value (\"\" for the empty one) is expected"),
            ("a in (b", 8, "',' or ')' is expected at its end"),
            ("a in (b,", 9, "a value"),
            ("a in (b c)", 9, "',' or ')' is expected, not 'c'"),
            ("a>", 3, "an integer is expected at its end"),
            ("a>b", 3, "'b' is not an integer"),
            ("a<99999999999999999999", 3, "is not an integer"),
            ("a==\"b", 4, "this quote is not closed"),
            ("a==\"\\b\"", 5, "'\\' stands before"),
            (
                "x,lockstep.io/replcas==2",
                3,
                "label 'lockstep.io/replcas' is not known",
            ),
            ("storageos.com/x", 1, "label 'storageos.com/x' is not known"),
            ("env(prod)", 4, "an operator"),
        ] {
            let bad = Selector::parse(text, Of::Volume).expect_err(text);
            assert_eq!(bad.column, column, "{bad}");
            assert!(bad.why.contains(why), "{bad}: not '{why}'");
        }
        let bad = Selector::parse("lockstep.io/replcas", Of::Volume).unwrap_err();
        assert_eq!(bad.hint, "did you mean lockstep.io/replicas?");
        let long = "a,".repeat(TEXT_MAX);
        assert_eq!(
            Selector::parse(&long, Of::Volume).unwrap_err().column,
            TEXT_MAX + 1
        );
    }

    fn key() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-c]",
            "[a-z0-9_./-]{1,8}",
            Just("in".to_string()),
            Just("notin".to_string()),
            Just("lockstep.io/replicas".to_string()),
        ]
    }

    fn value() -> impl Strategy<Value = String> {
        prop_oneof!["[a-c0-3]", "-?[0-9]{1,3}", "\\PC{0,6}", Just(String::new())]
    }

    fn term() -> impl Strategy<Value = Term> {
        let values = || prop::collection::vec(value(), 1..4);
        prop_oneof![
            key().prop_map(Term::Has),
            key().prop_map(Term::Lacks),
            (key(), value()).prop_map(|(k, v)| Term::Is(k, v)),
            (key(), value()).prop_map(|(k, v)| Term::IsNot(k, v)),
            (key(), values()).prop_map(|(k, v)| Term::In(k, v)),
            (key(), values()).prop_map(|(k, v)| Term::NotIn(k, v)),
            (key(), any::<i64>()).prop_map(|(k, n)| Term::Above(k, n)),
            (key(), -9..9i64).prop_map(|(k, n)| Term::Below(k, n)),
        ]
    }

    /// The terms with space wherever the grammar lets some be.
    fn spread(selector: &Selector, space: &str) -> String {
        let set = |values: &[String]| {
            let values: Vec<String> = values.iter().map(|v| quoted(v)).collect();
            format!(
                "({space}{}{space})",
                values.join(&format!("{space},{space}"))
            )
        };
        let term = |term: &Term| match term {
            Term::Has(k) => k.clone(),
            Term::Lacks(k) => format!("!{space}{k}"),
            Term::Is(k, v) => format!("{k}{space}={space}{}", quoted(v)),
            Term::IsNot(k, v) => format!("{k}{space}!={space}{}", quoted(v)),
            Term::In(k, v) => format!("{k} {space}in{space}{}", set(v)),
            Term::NotIn(k, v) => format!("{k} {space}notin{space}{}", set(v)),
            Term::Above(k, n) => format!("{k}{space}>{space}{n}"),
            Term::Below(k, n) => format!("{k}{space}<{space}{n}"),
        };
        let terms: Vec<String> = selector.terms.iter().map(term).collect();
        format!("{space}{}{space}", terms.join(&format!("{space},{space}")))
    }

    /// What a term means, said another way: over the list of all pairs.
    fn naive(term: &Term, labels: &Labels) -> bool {
        let with = |key: &String, good: &dyn Fn(&str) -> bool| {
            labels.iter().filter(|(k, v)| *k == key && good(v)).count() == 1
        };
        let number = |v: &str, good: &dyn Fn(i64) -> bool| v.trim().parse().is_ok_and(good);
        match term {
            Term::Has(k) => with(k, &|_| true),
            Term::Lacks(k) => !with(k, &|_| true),
            Term::Is(k, x) => with(k, &|v| v == x),
            Term::IsNot(k, x) => !with(k, &|v| v == x),
            Term::In(k, xs) => xs.iter().any(|x| with(k, &|v| v == x)),
            Term::NotIn(k, xs) => !xs.iter().any(|x| with(k, &|v| v == x)),
            Term::Above(k, n) => with(k, &|v| number(v, &|m| m > *n)),
            Term::Below(k, n) => with(k, &|v| number(v, &|m| m < *n)),
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(terms in prop::collection::vec(term(), 0..5), space in " {0,2}") {
            let selector = Selector { terms };
            prop_assert_eq!(Selector::parse(&selector.to_string(), Of::Volume), Ok(selector.clone()));
            prop_assert_eq!(Selector::parse(&spread(&selector, &space), Of::Volume), Ok(selector));
        }

        #[test]
        fn any_text_is_a_selector_or_has_a_place_where_it_is_none(text in "[abin!=<>,() \"\\\\ä1-]{0,24}|\\PC{0,24}") {
            match Selector::parse(&text, Of::Volume) {
                Ok(selector) => {
                    prop_assert_eq!(Selector::parse(&selector.to_string(), Of::Volume), Ok(selector));
                }
                Err(bad) => {
                    prop_assert!((1..=text.chars().count() + 1).contains(&bad.column), "{}", bad);
                    prop_assert!(!bad.why.is_empty() && !bad.hint.is_empty());
                }
            }
        }

        #[test]
        fn a_selector_matches_when_each_of_its_terms_does(
            terms in prop::collection::vec(term(), 0..4),
            labels in prop::collection::btree_map(key(), value(), 0..6),
        ) {
            let expected = terms.iter().all(|t| naive(t, &labels));
            prop_assert_eq!(Selector { terms }.matches(&labels), expected);
        }
    }
}
