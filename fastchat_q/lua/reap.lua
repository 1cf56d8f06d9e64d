-- REAP: hands back jobs whose lease ran out (their worker died or froze), ends jobs past one of their clocks, lets go
-- those whose pause before another try is over, and forgets tenants that stayed away. Everybody calls it every second;
-- there is no lock and no leader, and recovery depends on no single process.
--
-- ARGV: 1 how many of each at the most
-- returns {handed back, dead, expired}
allow_at_maxmemory()
local t, limit = now(), ARGV[1]
local returned, dead, expired = 0, 0, 0
promote(t, limit)
redis.call('ZREMRANGEBYSCORE', AWAY, '-inf', t)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASE, '-inf', t, 'LIMIT', 0, limit)) do
  if redis.call('HGET', JOB .. id, 'state') ~= 'running' then redis.call('ZREM', LEASE, id)
  elseif lost_worker(id, 'lease ran out') then dead = dead + 1
  else returned = returned + 1 end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LIVE, '-inf', t, 'LIMIT', 0, limit)) do
  local h = redis.call('HMGET', JOB .. id, 'attempt', 'n', 'deadline_ms', 'state')
  if h[4] ~= 'queued' and h[4] ~= 'running' then   -- gone, or it has ended: a terminal state never changes
    redis.call('ZREM', LIVE, id)
  elseif tonumber(h[3]) <= t then
    terminal(id, 'expired', 'deadline', '')
    expired = expired + 1
  elseif h[1] == '0' and h[2] == '0' then
    terminal(id, 'expired', 'queue deadline', '')
    expired = expired + 1
  else   -- it was started in time: the total deadline is the one that counts now
    redis.call('ZADD', LIVE, h[3], id)
  end
end
return {returned, dead, expired}
