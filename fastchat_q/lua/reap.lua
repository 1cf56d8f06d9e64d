-- REAP: hands back jobs whose lease ran out (their worker died or froze) and ends jobs past their deadline. Everybody
-- calls it every second; there is no lock and no leader, and recovery depends on no single process.
--
-- ARGV: 1 how many of each at the most
-- returns {handed back, dead, expired}
allow_at_maxmemory()
local t, limit = now(), ARGV[1]
local returned, dead, expired = 0, 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASE, '-inf', t, 'LIMIT', 0, limit)) do
  local h = redis.call('HMGET', JOB .. id, 'state', 'max_deaths')
  if h[1] ~= 'running' then
    redis.call('ZREM', LEASE, id)
  else
    local deaths = redis.call('HINCRBY', JOB .. id, 'deaths', 1)
    if deaths >= tonumber(h[2]) then
      terminal(id, 'dead', 'lost its worker ' .. deaths .. ' times', '')
      dead = dead + 1
    else
      hand_back(id)
      returned = returned + 1
    end
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', LIVE, '-inf', t, 'LIMIT', 0, limit)) do
  if redis.call('EXISTS', JOB .. id) == 1 then
    terminal(id, 'expired', 'deadline', '')
    expired = expired + 1
  else
    redis.call('ZREM', LIVE, id)
  end
end
return {returned, dead, expired}
