//! How log lines look: for people, or one JSON object a line for programs.

use std::fmt::Display;
use std::io::Write;
use std::str::FromStr;
use std::time::SystemTime;

use log::LevelFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object a line: `time`, `level`, `target`, `message`, and `attachment` in the process of
    /// one.
    Json,
}

impl LogFormat {
    /// All of them, as a command line names them.
    pub const NAMES: [&'static str; 2] = ["text", "json"];
}

impl Display for LogFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Text => Self::NAMES[0],
            Self::Json => Self::NAMES[1],
        })
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is neither text nor json")),
        }
    }
}

/// Sends the log to standard error from now on.
pub fn init(level: LevelFilter, format: LogFormat) {
    init_for(level, format, None);
}

/// As [`init`]. In the process of one attachment, each line has its name: many such processes share a
/// log.
pub fn init_for(level: LevelFilter, format: LogFormat, attachment: Option<&str>) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).format_target(false);
    let attachment = attachment.map(str::to_owned);
    match (format, attachment) {
        (LogFormat::Text, None) => {}
        (LogFormat::Text, Some(name)) => {
            builder.format(move |out, record| {
                let now = crate::timestamp(SystemTime::now());
                let (level, message) = (record.level(), record.args());
                writeln!(out, "[{now} {level:<5} {name}] {message}")
            });
        }
        (LogFormat::Json, attachment) => {
            builder.format(move |out, record| {
                let line = json_line(SystemTime::now(), record, attachment.as_deref());
                writeln!(out, "{line}")
            });
        }
    }
    builder.init();
}

fn json_line(
    now: SystemTime,
    record: &log::Record<'_>,
    attachment: Option<&str>,
) -> serde_json::Value {
    let mut line = serde_json::json!({
        "time": crate::timestamp(now),
        "level": record.level().as_str().to_ascii_lowercase(),
        "target": record.target(),
        "message": record.args().to_string(),
    });
    if let Some(attachment) = attachment {
        line["attachment"] = attachment.into();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_of_json_holds_the_message_whatever_is_in_it() {
        let record = log::Record::builder()
            .level(log::Level::Warn)
            .target("farbus")
            .args(format_args!("a \"quoted\"\nmessage"))
            .build();

        let line = json_line(SystemTime::UNIX_EPOCH, &record, Some("vm1")).to_string();

        assert!(!line.contains('\n'));
        let back: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        assert_eq!(back["message"], "a \"quoted\"\nmessage");
        assert_eq!(back["level"], "warn");
        assert_eq!(back["attachment"], "vm1");
        assert_eq!(back["time"], "1970-01-01T00:00:00.000Z");
    }
}
