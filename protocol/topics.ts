import { DeviceId, EnrolmentId, GroupAddress, GroupId } from './ids.ts'

/** Who a topic belongs to, and in which direction it carries. */
export type Topic =
  | { kind: 'device'; device: DeviceId; direction: 'up' | 'down' }
  | { kind: 'enrolment'; client: EnrolmentId; direction: 'up' | 'down' }
  | { kind: 'group'; group: GroupId; shard: number }

export const deviceTopic = (device: DeviceId, direction: 'up' | 'down'): string => `fk/1/${device}/${direction}`
export const enrolmentTopic = (client: EnrolmentId, direction: 'up' | 'down'): string => `fk/1/e/${client}/${direction}`
export const groupTopic = (group: GroupId, shard: number): string => `fk/1/${groupAddress(group, shard)}`
/** The addressee of what goes to the members in one shard of a group. */
export const groupAddress = (group: GroupId, shard: number): GroupAddress => GroupAddress.parse(`g/${group}/${shard}`)
export const topicOfAddress = (address: GroupAddress): string => `fk/1/${address}`
/** Group and shard of an address. */
export const partsOfAddress = (address: GroupAddress): { readonly group: GroupId; readonly shard: number } => {
  const [, group = '', shard = ''] = address.split('/')
  return { group: GroupId.parse(group), shard: Number(shard) }
}

/** The one parser of topic names; `undefined` for whatever is not exactly one of ours (wildcards included). */
export const parseTopic = (topic: string): Topic | undefined => {
  if (topic.length > 160) return undefined
  const parts = topic.split('/')
  if (parts[0] !== 'fk' || parts[1] !== '1') return undefined
  if (parts.length === 4) {
    const device = DeviceId.safeParse(parts[2])
    const direction = parts[3]
    return device.success && (direction === 'up' || direction === 'down') ? { kind: 'device', device: device.data, direction } : undefined
  }
  if (parts.length !== 5) return undefined
  if (parts[2] === 'e') {
    const client = EnrolmentId.safeParse(parts[3])
    const direction = parts[4]
    return client.success && (direction === 'up' || direction === 'down') ? { kind: 'enrolment', client: client.data, direction } : undefined
  }
  const group = GroupId.safeParse(parts[3])
  const shard = parts[4] ?? ''
  return parts[2] === 'g' && group.success && /^(0|[1-9]\d{0,4})$/.test(shard) ? { kind: 'group', group: group.data, shard: Number(shard) } : undefined
}
