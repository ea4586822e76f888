// What the consumer and the dispatcher's side have in common.
const LOCK = Number(process.env.LOCK ?? 30); // seconds

exports.connection = { url: process.env.REDIS_URL ?? "redis://127.0.0.1:6379" };
// The dispatcher's side doesn't wait for a Redis that is away: it says so, and looks again later.
exports.oneTry = { ...exports.connection, retryStrategy: () => null };

// A job whose worker has died stays locked for so long at most, and waits again from the first check
// after that or the second. When that happens for the third time it goes to the failed ones.
exports.stalling = { lockDuration: LOCK * 1000, stalledInterval: LOCK * 1000, maxStalledCount: 2 };
