//! Counters and gauges as Prometheus reads them: its text format, version 0.0.4.
//!
//! # Rules
//! 1. Each metric says what it is and what it means once, before its values.
//! 2. Names are ours. The values of labels are names that users give, and are escaped.
//!
//! # Why no registry
//! A count stands beside the work that it counts, as an atomic, and whoever owns it writes it here when it is asked for. A
//! registry for all of them would be a global that every layer writes to, and would have to be kept in step with disks
//! that come and go.

/// What stands before every name.
const PREFIX: &str = "afterimage_";

/// How a value changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It grows until the process ends; its name ends in `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// The text, as far as it is written.
#[derive(Debug, Default)]
pub struct Text {
    out: String,
}

impl Text {
    /// Begins.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a counter; `name` is without the prefix, `help` a sentence.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(Kind::Counter, name, help).value(&[], value);
    }

    /// Writes a gauge; `name` is without the prefix, `help` a sentence.
    pub fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(Kind::Gauge, name, help).value(&[], value);
    }

    /// Begins a metric that has a value for each of several things.
    pub fn family<'a>(&'a mut self, kind: Kind, name: &'a str, help: &str) -> Family<'a> {
        assert!(kind == Kind::Gauge || name.ends_with("_total"), "{name} is a counter, and is to be called so");
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.out.push_str(&format!("# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}\n"));
        Family { text: self, name }
    }

    /// Ends.
    #[must_use]
    pub fn finish(self) -> String {
        self.out
    }
}

/// A metric whose values are being written.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut Text,
    name: &'a str,
}

impl Family<'_> {
    /// Writes the value of the thing that the labels (name, value) tell.
    pub fn value(&mut self, labels: &[(&str, &str)], value: u64) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        self.text.out.push_str(&format!("{PREFIX}{}{labels} {value}\n", self.name));
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_prometheus_reads() {
        let mut text = Text::new();
        text.counter("reads_total", "Reads.", 3);
        let mut sizes = text.family(Kind::Gauge, "size_bytes", "Bytes of a disk.");
        sizes.value(&[("disk", "web")], 1);
        sizes.value(&[("disk", "a\"b\\c\nd"), ("kind", "nbd")], u64::MAX);
        let want = "# HELP afterimage_reads_total Reads.\n# TYPE afterimage_reads_total counter\nafterimage_reads_total 3\n\
            # HELP afterimage_size_bytes Bytes of a disk.\n# TYPE afterimage_size_bytes gauge\n\
            afterimage_size_bytes{disk=\"web\"} 1\n\
            afterimage_size_bytes{disk=\"a\\\"b\\\\c\\nd\",kind=\"nbd\"} 18446744073709551615\n";
        assert_eq!(text.finish(), want);
    }
}
