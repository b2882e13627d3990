//! Prometheus' text format: families with their help, samples with escaped labels.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::cluster::metrics::{Histogram, LATENCY_BUCKETS};

/// What a family's figures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, sum and count.
    Histogram,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Labels of one sample.
pub(super) type Pairs<'a> = &'a [(&'a str, &'a str)];

struct Family {
    kind: Kind,
    help: &'static str,
    samples: String,
}

/// Families by name: the format wants the samples of one together, whatever order they come in.
#[derive(Default)]
pub(super) struct Exposition {
    families: BTreeMap<String, Family>,
}

impl Exposition {
    /// Adds a counter's or gauge's sample.
    pub(super) fn sample(
        &mut self,
        name: &str,
        kind: Kind,
        help: &'static str,
        labels: Pairs<'_>,
        value: f64,
    ) {
        let family = self.family(name, kind, help);
        line(&mut family.samples, name, labels, None, value);
    }

    /// Adds a histogram.
    pub(super) fn histogram(
        &mut self,
        name: &str,
        help: &'static str,
        labels: Pairs<'_>,
        histogram: &Histogram,
    ) {
        let family = self.family(name, Kind::Histogram, help);
        let out = &mut family.samples;
        let bucket = format!("{name}_bucket");
        let mut sum = 0;
        for (bound, count) in LATENCY_BUCKETS.iter().zip(&histogram.counts) {
            sum += count;
            line(out, &bucket, labels, Some(&bound.to_string()), sum as f64);
        }
        let count = histogram.count() as f64;
        line(out, &bucket, labels, Some("+Inf"), count);
        line(out, &format!("{name}_sum"), labels, None, histogram.sum);
        line(out, &format!("{name}_count"), labels, None, count);
    }

    /// The whole text.
    pub(super) fn text(self) -> String {
        let mut out = String::new();
        for (name, family) in self.families {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "# HELP {name} {}", family.help);
            let _ = writeln!(out, "# TYPE {name} {}", family.kind.word());
            out += &family.samples;
        }
        out
    }

    fn family(&mut self, name: &str, kind: Kind, help: &'static str) -> &mut Family {
        self.families.entry(name.into()).or_insert(Family {
            kind,
            help,
            samples: String::new(),
        })
    }
}

fn line(out: &mut String, name: &str, labels: Pairs<'_>, le: Option<&str>, value: f64) {
    out.push_str(name);
    let pairs: Vec<String> = labels
        .iter()
        .copied()
        .chain(le.map(|bound| ("le", bound)))
        .map(|(k, v)| format!("{k}=\"{}\"", escape(v)))
        .collect();
    if !pairs.is_empty() {
        let _ = write!(out, "{{{}}}", pairs.join(","));
    }
    let _ = writeln!(out, " {value}");
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_kept_together_and_labels_escaped() {
        let mut e = Exposition::default();
        e.sample("b_total", Kind::Counter, "B.", &[("v", "x")], 1.0);
        e.sample("a", Kind::Gauge, "A.", &[], 1.5);
        e.sample("b_total", Kind::Counter, "B.", &[("v", "q\"\\\n")], 2e12);
        assert_eq!(
            e.text(),
            "# HELP a A.\n# TYPE a gauge\na 1.5\n# HELP b_total B.\n# TYPE b_total counter\n\
             b_total{v=\"x\"} 1\nb_total{v=\"q\\\"\\\\\\n\"} 2000000000000\n"
        );
    }

    #[test]
    fn buckets_are_cumulative() {
        let mut h = Histogram::default();
        h.observe(0.000_05);
        h.observe(2.0);
        h.observe(60.0);
        let mut e = Exposition::default();
        e.histogram("x_seconds", "X.", &[("v", "a")], &h);
        let text = e.text();
        for line in [
            "x_seconds_bucket{v=\"a\",le=\"0.00005\"} 1",
            "x_seconds_bucket{v=\"a\",le=\"3\"} 2",
            "x_seconds_bucket{v=\"a\",le=\"10\"} 2",
            "x_seconds_bucket{v=\"a\",le=\"+Inf\"} 3",
            "x_seconds_count{v=\"a\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
