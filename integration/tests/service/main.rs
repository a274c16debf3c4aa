//! The agent as a service, as a cloud uses it: the REST interface of a real daemon, whose device servers
//! are real daemons with software drives, and whose VMMs are vfio-user clients.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bed;
mod both;
mod crash;
mod crowd;
mod endurance;
mod hopeless;
mod impostor;
mod leaving;
mod life;
mod load;
mod manager;
mod openapi;
mod own_user;
mod refusals;
