-- RELEASE: a worker that drains gives a job back, unharmed: it goes to the head of its lane, its tokens stay in the log.
--
-- ARGV: 1 id, 2 fence
-- returns 1 ok | 0 lost
allow_at_maxmemory()
local h = redis.call('HMGET', JOB .. ARGV[1], 'state', 'fence')
if h[1] ~= 'running' or h[2] ~= ARGV[2] then return 0 end
hand_back(ARGV[1], 'released')
return 1
