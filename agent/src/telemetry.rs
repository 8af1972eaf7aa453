//! What the agent says of itself: log lines on stderr, in text or JSON, with a level that
//! `debug log-level` changes while it runs. Connections are not logged here but in
//! [`crate::access_log`], which goes to stdout.
#![forbid(unsafe_code)]

use std::{io, sync::Arc};

use parking_lot::Mutex;
use thiserror::Error;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Error)]
pub enum LogError {
    #[error(
        "log level {level:?}: {reason}; write a level (error, warn, info, debug, trace), or \
         target=level pairs separated by commas"
    )]
    Level { level: String, reason: String },
    #[error("another part of the process has set up logging already")]
    AlreadySet,
    #[error("the log's filter is gone")]
    Gone,
}

/// Reads and changes the level.
#[derive(Clone)]
pub struct LogLevel {
    handle: reload::Handle<EnvFilter, Registry>,
    /// As it was asked for.
    current: Arc<Mutex<String>>,
}

/// Once per process.
pub fn init(level: &str, format: LogFormat) -> Result<LogLevel, LogError> {
    let (filter, handle) = reload::Layer::new(parse(level)?);
    let lines = fmt::layer().with_writer(io::stderr);
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Text => Box::new(lines.with_ansi(false)),
        LogFormat::Json => Box::new(lines.json().flatten_event(true)),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|_| LogError::AlreadySet)?;
    Ok(LogLevel {
        handle,
        current: Arc::new(Mutex::new(level.to_owned())),
    })
}

impl LogLevel {
    pub fn get(&self) -> String {
        self.current.lock().clone()
    }

    pub fn set(&self, level: &str) -> Result<(), LogError> {
        let filter = parse(level)?;
        // Held until both are changed, so that two callers cannot leave the one's word beside the
        // other's filter.
        let mut current = self.current.lock();
        self.handle.reload(filter).map_err(|_| LogError::Gone)?;
        level.clone_into(&mut current);
        Ok(())
    }
}

/// Also validates a level before there is anything to log to.
pub fn parse(level: &str) -> Result<EnvFilter, LogError> {
    let bad = |reason: String| LogError::Level {
        level: level.to_owned(),
        reason,
    };
    // A single unknown word would be taken for a target to be logged in full.
    for directive in level.split(',').map(str::trim) {
        let is_level = !directive.is_empty()
            && directive
                .parse::<tracing_subscriber::filter::LevelFilter>()
                .is_ok();
        if !is_level && !directive.contains('=') {
            return Err(bad(format!("{directive:?} is no level")));
        }
    }
    EnvFilter::builder()
        .parse(level)
        .map_err(|error| bad(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_targets_are_understood_and_nonsense_is_named() {
        for level in ["info", "warn,picomesh=debug", "warn,linkerd=info", "off"] {
            parse(level).unwrap();
        }
        for level in ["", "loud", "info,verbose", "picomesh=loud"] {
            let error = parse(level).unwrap_err().to_string();
            assert!(error.contains("error, warn, info, debug, trace"), "{error}");
        }
    }

    #[test]
    fn the_level_changes_while_the_process_runs() {
        let level = init("warn", LogFormat::Text).unwrap();
        assert!(!tracing::enabled!(tracing::Level::INFO));
        level.set("debug").unwrap();
        assert!(tracing::enabled!(tracing::Level::DEBUG));
        assert_eq!(level.get(), "debug");
        assert!(level.set("loud").is_err());
        assert_eq!(level.get(), "debug");
        assert!(init("info", LogFormat::Text).is_err());
    }
}
