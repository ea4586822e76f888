// What the consumer and the dispatcher's side have in common.
const LOCK = Number(process.env.LOCK ?? 30); // seconds

exports.connection = { url: process.env.REDIS_URL ?? "redis://127.0.0.1:6379" };
// The dispatcher's side doesn't wait for a Redis that is away: it says so, and looks again later.
exports.oneTry = { ...exports.connection, retryStrategy: () => null };

// A job whose worker has died stays locked for LOCK at most. It waits again after the first check
// that follows, or the second. When that happens for the third time it goes to the failed jobs.
exports.stalling = { lockDuration: LOCK * 1000, stalledInterval: LOCK * 1000, maxStalledCount: 2 };
