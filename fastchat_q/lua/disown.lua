-- DISOWN: the jobs that a worker is said to run and does not. Its supervisor calls it when the worker's process has
-- crashed (each job lost a worker), the worker itself when the reply to a CLAIM was lost (none did).
--
-- ARGV: 1 worker id, 2 crashed (1 | 0), 3 why, for the jobs' history, 4.. ids of the jobs that it does run
-- returns {handed back, dead}
local LOOKED_AT = 4096
allow_at_maxmemory()
local known, back, dead = {}, 0, 0
for i = 4, #ARGV do known[ARGV[i]] = true end
for _, id in ipairs(redis.call('ZRANGE', LEASE, 0, LOOKED_AT - 1)) do
  local h = redis.call('HMGET', JOB .. id, 'state', 'worker')
  if h[1] == 'running' and h[2] == ARGV[1] and not known[id] then
    if ARGV[2] == '0' then
      hand_back(id, ARGV[3])
      back = back + 1
    elseif lost_worker(id, ARGV[3]) then dead = dead + 1
    else back = back + 1 end
  end
end
return {back, dead}
