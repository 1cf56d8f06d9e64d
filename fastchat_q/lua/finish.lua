-- FINISH: the worker ends its job, or asks for another try. The token count is checked, so a FINISH that overtakes a lost
-- EMIT is refused. A try that may not be repeated any more leaves the job dead.
--
-- ARGV: 1 id, 2 fence, 3 n tokens in the log, 4 state (succeeded | failed | retry), 5 reason, 6 result (JSON),
--       7 tokens it really cost (0: unknown), 8 ms until the next try, 9 tries that may be repeated (-1: this one does
--       not count)
-- returns 1 ok | 0 lost | 3 gap: the log is not complete, emit first
local SMOOTHING = 16   -- the measured service time follows the last jobs, some sixteen of them
allow_at_maxmemory()
local id, state, reason = ARGV[1], ARGV[4], ARGV[5]
local h = redis.call('HMGET', JOB .. id, 'state', 'fence', 'n', 'start_ms', 'lane', 'tenant', 'cost', 'weight')
if h[1] ~= 'running' or h[2] ~= ARGV[2] then return 0 end
if h[3] ~= ARGV[3] then return 3 end
local t = now()
if state == 'retry' then
  local most = tonumber(ARGV[9])
  if most < 0 or redis.call('HINCRBY', JOB .. id, 'retries', 1) <= most then
    redis.call('HSET', JOB .. id, 'reason', reason)
    hand_back(id, 'retry ' .. reason, t + tonumber(ARGV[8]))
    return 1
  end
  terminal(id, 'dead', reason, ARGV[6])
  return 1
end
if state == 'succeeded' then
  local took, mean = t - tonumber(h[4]), redis.call('HGET', STAT, 'service_ms')
  redis.call('HSET', STAT, 'service_ms', mean and mean + (took - mean) / SMOOTHING or took)
end
local used, account = tonumber(ARGV[7]), 'F:' .. h[6]
if used > 0 and redis.call('ZCARD', WAIT[h[5]]) > 0 and redis.call('HEXISTS', TAGS[h[5]], account) == 1 then
  redis.call('HINCRBYFLOAT', TAGS[h[5]], account, (used - tonumber(h[7])) / tonumber(h[8]))
end
terminal(id, state, reason, ARGV[6])
return 1
