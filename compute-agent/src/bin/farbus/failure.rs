//! How a command fails: an exit code, and what is told.

use std::io::{self, Write};
use std::process::ExitCode;

use farbus_rest::client::ClientError;
use farbus_rest::problem::Problem;

/// A failure with the exit code that tells of it.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
    problem: Option<Box<Problem>>,
}

impl Failure {
    /// The command line is wrong in a way that its parser cannot see.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(2, message)
    }

    /// What was asked for did not come about.
    pub(crate) fn not_come_about(message: impl Into<String>) -> Self {
        Self::new(5, message)
    }

    /// Doctor found a problem, and has told of it.
    pub(crate) fn unwell() -> Self {
        Self::new(6, "")
    }

    fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            problem: None,
        }
    }

    /// Tells what happened, and returns the exit code.
    pub(crate) fn tell(self, json: bool) -> ExitCode {
        if !self.message.is_empty() {
            eprintln!("farbus: {}", self.message);
        }
        if let Some(remedy) = self.problem.as_ref().and_then(|p| p.remedy.as_ref()) {
            eprintln!("  -> {remedy}");
        }
        if let (true, Some(problem)) = (json, &self.problem) {
            // Who has gone does not read the reason either.
            let _ = crate::show::json(problem);
        }
        ExitCode::from(self.code)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Problem(problem) => Self {
                code: 4,
                message: format!("{problem} ({} {})", problem.status, problem.kind),
                problem: Some(problem),
            },
            ClientError::Connect { .. } => Self::new(3, with_causes(&error)),
            error => Self::new(1, with_causes(&error)),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // As other programs end whose reader, such as head, has seen enough.
        let code = u8::from(error.kind() != io::ErrorKind::BrokenPipe);
        let message = if code == 0 {
            String::new()
        } else {
            error.to_string()
        };
        Self::new(code, message)
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        io::Error::from(error).into()
    }
}

/// An error and what caused it, in one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// Prints a remark that is not what was asked for.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "farbus: {text}");
}
